"""The `video-text-to-text` pipeline: a video in, a text and the video's events out.

    pipe = transformers.pipeline(model=repo, trust_remote_code=True)
    pipe("clip.mp4")[0]["generated_text"]

transformers finds it through `custom_pipelines` in the checkpoint's `config.json`. The processor is bound to the
model, so each video is encoded once, whatever the batch and however many texts are generated for it.
"""

import dataclasses

import numpy as np
import torch
from transformers import GenerationConfig, Pipeline
from transformers.image_utils import is_pil_image
from transformers.utils.chat_template_utils import Chat, is_valid_message

DEFAULT_TEXT = "Describe this video."


class VJepaQwenPipeline(Pipeline):
    """
    Describes videos, or answers about them.

    Example:

    ```python
    >>> from transformers import TextStreamer, pipeline

    >>> pipe = pipeline(model=repo, trust_remote_code=True)
    >>> pipe("clip.mp4", text="What happens here?", max_new_tokens=64)
    [{'generated_text': '...', 'events': [{'start_seconds': 0.0, 'end_seconds': 2.5, 'score': 0.0}, ...]}]
    >>> pipe(["first.mp4", "second.mp4"], batch_size=2)  # a list of such lists
    >>> pipe([{"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "Why?"}]}])
    >>> pipe("clip.mp4", streamer=TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True))
    ```

    Args:
        model (`VJepaQwenForConditionalGeneration`): The model.
        processor (`VJepaQwenProcessor`): Its processor; it is bound to the model.
        kwargs: As of every pipeline. What is named below for a call may be given here too, for all calls.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("processor (None) must be the VJepaQwenProcessor of the model; pass processor=")
        self.processor.bind(self.model)

    def __call__(self, videos=None, text: str | list[str] | None = None, **kwargs) -> list:
        """
        Args:
            videos:
                One input, or a list, dataset or generator of them. An input is a video (path, URL, bytes, file object,
                frames as an array or a list of images, or a `VideoEvents` of the processor's `segment`), a chat (a
                list of messages), or a `dict` with a `"video"` and, optionally, a `"text"`.
            text (`str` or `list[str]`, *optional*, defaults to `"Describe this video."`):
                What to ask, for all videos or one for each. Alone, it is a prompt without video, or chats.
            batch_size (`int`, *optional*, defaults to 1): Inputs that are generated for together.
            num_frames (`int`, *optional*), fps (`float`, *optional*): Frames to look at in each video.
            enable_thinking (`bool`, *optional*, defaults to `False`): Whether a model that can think does.
            return_full_text (`bool`, *optional*, defaults to `False`):
                Whether `generated_text` is the conversation, a list of messages with the answer as the last one.
            skip_special_tokens (`bool`, *optional*, defaults to `True`): Whether they are left out of the text.
            kwargs: To `generate`: `max_new_tokens`, `do_sample`, `num_return_sequences`, `streamer`, ...

        Returns:
            `list[dict]`: For each generated sequence a `dict` with `generated_text` and `events`, a list of `dict`
            with `start_seconds`, `end_seconds` and `score` (and `video_index`, if the chat has several videos). For a
            list of inputs a list of these; for a dataset or generator an iterator.

        Raises:
            ValueError: for what is no readable video, and for inputs that do not fit each other.
        """
        if videos is None and text is None:
            raise ValueError("videos (None) and text (None) must not both be left out; pass a video")
        if _is_images(videos):
            videos = {"video": videos}
        if _is_chat(videos) or _is_chats(videos):
            if text is not None:
                raise ValueError(f"text ({text!r}) must be left out with a chat: write it into the chat's messages")
        elif videos is None:
            if not _is_chat(text) and not _is_chats(text):
                text = [{"text": item} for item in text] if isinstance(text, list) else {"text": text}
            videos, text = text, None
        elif isinstance(text, (list, tuple)):
            if not isinstance(videos, (list, tuple)) or len(videos) != len(text):
                raise ValueError(f"text ({len(text)} entries) must be one string, or one for each entry of videos")
            videos, text = [{"video": video, "text": item} for video, item in zip(videos, text, strict=True)], None
        if isinstance(videos, tuple):
            videos = list(videos)
        if isinstance(videos, list) and not videos:
            return []
        if text is not None:
            kwargs["text"] = text
        return super().__call__(videos, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """Saves the model with its code, and the processor: a folder that `pipeline(model=folder)` loads again."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(
        self,
        text: str | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        enable_thinking: bool | None = None,
        return_full_text: bool | None = None,
        skip_special_tokens: bool | None = None,
        **generate_kwargs,
    ):
        preprocess = {"text": text}
        forward = {"num_frames": num_frames, "fps": fps, "enable_thinking": enable_thinking}
        forward["generate_kwargs"] = generate_kwargs or None
        postprocess = {"return_full_text": return_full_text, "skip_special_tokens": skip_special_tokens}
        return tuple(
            {name: value for name, value in parameters.items() if value is not None}
            for parameters in (preprocess, forward, postprocess)
        )

    def preprocess(self, inputs, text: str = DEFAULT_TEXT) -> dict:
        """Makes a chat of whatever came in. Videos are read later: on the tower's device, once for the batch."""
        if _is_chat(inputs):
            inputs = Chat(inputs)
        if not isinstance(inputs, Chat):
            if not isinstance(inputs, dict):
                inputs = {"video": inputs}
            content = [{"type": "video", "video": inputs["video"]}] if inputs.get("video") is not None else []
            content.append({"type": "text", "text": inputs.get("text") or text})
            inputs = Chat([{"role": "user", "content": content}])
        return {"chat": inputs}

    def _forward(
        self, model_inputs: dict, num_frames=None, fps=None, enable_thinking=False, generate_kwargs: dict | None = None
    ) -> dict:
        is_batch = isinstance(model_inputs["chat"], list)
        chats = model_inputs["chat"] if is_batch else [model_inputs["chat"]]
        prompts, videos = [], []
        for chat in chats:
            continues = chat.messages[-1]["role"] == "assistant"
            videos.append([self._segment(video, num_frames, fps) for video in _find_videos(chat.messages)])
            prompts.append(
                self.processor.apply_chat_template(
                    chat.messages,
                    tokenize=False,
                    add_generation_prompt=not continues,
                    continue_final_message=continues,
                    enable_thinking=enable_thinking,
                )
            )
        all_videos = [video for chat_videos in videos for video in chat_videos]
        # The template has written all special tokens.
        inputs = self.processor(
            text=prompts, videos=all_videos or None, add_special_tokens=False, return_tensors="pt"
        ).to(self.device)
        generate_kwargs = self._prepare_generate_kwargs(generate_kwargs or {}, return_dict_in_generate=False)
        sequences = self.model.generate(**inputs, **generate_kwargs)[:, inputs["input_ids"].shape[1] :]
        outputs = {
            "chat": chats,
            "tokens": sequences.unflatten(0, (len(chats), -1)).tolist(),
            "events": [_list_events(chat_videos) for chat_videos in videos],
        }
        return outputs if is_batch else {name: values[0] for name, values in outputs.items()}

    def _segment(self, video, num_frames: int | None, fps: float | None):
        # By name: another copy of the processor's module may have made it.
        if type(video).__name__ == "VideoEvents":
            return video
        segmented = self.processor.segment(video, num_frames=num_frames, fps=fps)
        if len(segmented) != 1:
            raise ValueError(f"video ({len(segmented)} videos) must be one; pass several as a list, for a batch")
        return segmented[0]

    def postprocess(self, model_outputs: dict, return_full_text=False, skip_special_tokens=True) -> list[dict]:
        texts = self.processor.batch_decode(model_outputs["tokens"], skip_special_tokens=skip_special_tokens)
        if return_full_text:
            texts = [_append_answer(model_outputs["chat"].messages, text) for text in texts]
        return [{"generated_text": text, "events": model_outputs["events"]} for text in texts]


def _is_images(inputs) -> bool:
    """Whether this is one video, frame by frame, and no batch."""
    return (
        isinstance(inputs, (list, tuple))
        and len(inputs) > 0
        and all(
            is_pil_image(item) or (isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim < 4) for item in inputs
        )
    )


def _is_chat(inputs) -> bool:
    return isinstance(inputs, (list, tuple)) and len(inputs) > 0 and is_valid_message(inputs[0])


def _is_chats(inputs) -> bool:
    return isinstance(inputs, (list, tuple)) and len(inputs) > 0 and _is_chat(inputs[0])


def _find_videos(messages: list[dict]) -> list:
    """The videos of a chat, in order."""
    videos = []
    for message in messages:
        for item in message["content"] if isinstance(message["content"], (list, tuple)) else []:
            sources = [item[name] for name in ("video", "url", "path") if item.get(name) is not None]
            if item.get("type") not in ("text", "video") or (item["type"] == "video" and len(sources) != 1):
                raise ValueError(
                    f"content of a message (type {item.get('type')!r}, keys {', '.join(item)}) must be a text, or a "
                    "video with one of 'video', 'url' and 'path'"
                )
            videos.extend(sources if item["type"] == "video" else [])
    return videos


def _list_events(videos: list) -> list[dict]:
    several = len(videos) > 1
    return [
        {**({"video_index": index} if several else {}), **dataclasses.asdict(event)}
        for index, video in enumerate(videos)
        for event in video.events
    ]


def _append_answer(messages: list[dict], text: str) -> list[dict]:
    """The conversation with the answer as its last message, or with its last message, an assistant's, completed."""
    last = messages[-1]
    if last["role"] != "assistant":
        return [*messages, {"role": "assistant", "content": text}]
    if isinstance(last["content"], str):
        return [*messages[:-1], {**last, "content": last["content"] + text}]
    *content, final = last["content"]
    return [*messages[:-1], {**last, "content": [*content, {**final, "text": final["text"] + text}]}]


__all__ = ["VJepaQwenPipeline"]
