"""How many video tokens frame-based input takes: transformers' video processor of Qwen3.5, with published limits.

count_frame_tokens(60.0, num_frames=1800, height=1080, width=1920)        # 11400
"""

from transformers import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

# `size` in video_preprocessor_config.json of Qwen/Qwen3.5-9B: pixels of all frames that are looked at.
PUBLISHED_SIZE = {"longest_edge": 25165824, "shortest_edge": 4096}


def sample_frames(video_processor: Qwen3VLVideoProcessor, duration_seconds: float, num_frames: int):
    """Indices of the frames that it looks at: 2 per second, at most 768."""
    metadata = VideoMetadata(total_num_frames=num_frames, fps=num_frames / duration_seconds)
    return video_processor.sample_frames(metadata)


def count_frame_tokens(duration_seconds: float, *, num_frames: int, height: int, width: int, **options) -> int:
    """
    Visual tokens, without the time stamps and markers that come on top.

    Args:
        duration_seconds (`float`), num_frames (`int`), height (`int`), width (`int`): Of the video.
        options: Of `Qwen3VLVideoProcessor`; by default the size limits of the published checkpoints.
    """
    video_processor = Qwen3VLVideoProcessor(**(options or {"size": PUBLISHED_SIZE}))
    num_sampled = len(sample_frames(video_processor, duration_seconds, num_frames))
    # A single frame is repeated: a token stands for two.
    num_sampled = max(num_sampled, video_processor.temporal_patch_size)
    num_patches = video_processor.get_num_of_video_patches(num_sampled, height, width)
    return num_patches // video_processor.merge_size**2
