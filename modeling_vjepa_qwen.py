"""VJepaQwen: V-JEPA 2 sees, event spans pool, a projector translates, a causal language model speaks.

    frames (num_videos, num_frames, 3, height, width)
      -> VJepaQwenVisionTower: V-JEPA 2 encoder, mean over the patches of each temporal step
    frame features (num_videos, num_steps, vision hidden)
      -> mean over the steps of each event (`frame_event_ids`)
    event features (num_events, vision hidden)
      -> VJepaQwenProjector
    event embeddings (num_events, text hidden)
      -> written over the `video_token_id` placeholders of the prompt -> language model

The order of the file follows transformers' LLaVA: outputs, tower, projector, model, model with language head.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Encoder, VJEPA2PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_vjepa_qwen import VJepaQwenConfig
from .event_segmentation import count_events, pool_events
from .linked_checkpoint import LinkedCheckpointMixin
from .tower_layers import TOWER_ATTENTION, PatchConvolution, RotaryAttention

# Of one forward pass of the tower: a 64-frame window of ViT-L fills an accelerator, and so do several smaller ones.
TOKENS_PER_PASS = 8192


@dataclass
class VJepaQwenModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Output of [`VJepaQwenModel`].

    Args:
        video_hidden_states (`torch.FloatTensor` of shape `(total_num_events, text hidden)`, *optional*):
            The embeddings that were written over the placeholders, all videos of the batch in prompt order.
    """

    video_hidden_states: torch.FloatTensor | None = None


@dataclass
class VJepaQwenCausalLMOutputWithPast(ModelOutput):
    r"""
    Output of [`VJepaQwenForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): Next-token loss, when `labels` are given.
        logits (`torch.FloatTensor` of shape `(batch, length, vocab_size)`): Scores before the softmax.
        past_key_values (`Cache`, *optional*): The language model's cache.
        video_hidden_states (`torch.FloatTensor` of shape `(total_num_events, text hidden)`, *optional*):
            The embeddings that were written over the placeholders, all videos of the batch in prompt order.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None
    video_hidden_states: torch.FloatTensor | None = None


class VJepaQwenVisionTower(VJEPA2PreTrainedModel):
    """transformers' V-JEPA 2 encoder without the predictor, which costs half as much again and is not needed here.

    Parameter names are those of `VJEPA2Model` (`encoder.layer.N...`), so its checkpoints and adapters fit. Patches,
    rotary angles and, unless `attn_implementation` names another one, the attention function are those of
    `tower_layers.py`.
    """

    def __init__(self, config):
        super().__init__(config)
        self.encoder = VJEPA2Encoder(config)
        patch_shape = (config.tubelet_size, config.patch_size, config.patch_size)
        self.encoder.embeddings.patch_embeddings.proj = PatchConvolution(
            config.in_chans, config.hidden_size, kernel_size=patch_shape, stride=patch_shape
        )
        for layer in self.encoder.layer:
            layer.attention = RotaryAttention(config, config.hidden_size, config.num_attention_heads)
        self.post_init()

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        return super().get_correct_attn_implementation(requested_attention or TOWER_ATTENTION, is_init_check)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embeddings.patch_embeddings

    def forward(self, pixel_values_videos: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Encodes one window of each video.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(batch, num_frames, 3, crop_size, crop_size)`):
                Normalised frames, at most `frames_per_clip`, a multiple of `tubelet_size`.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` of shape `(batch, num_steps * patches, hidden)` and
            `pooler_output` of shape `(batch, num_steps, hidden)`, float32, the mean over each step's patches.

        Raises:
            ValueError: for another frame size (the positions come from `crop_size` and would silently be wrong) or
                another number of frames.
        """
        _, num_frames, _, height, width = pixel_values_videos.shape
        crop_size, tubelet_size = self.config.crop_size, self.config.tubelet_size
        if (height, width) != (crop_size, crop_size):
            raise ValueError(
                f"frame size ({height}x{width}) must be {crop_size}x{crop_size}, the size that the tower's positions "
                "are made for; use the VJepaQwenVideoProcessor that is saved with the model"
            )
        if num_frames == 0 or num_frames % tubelet_size or num_frames > self.config.frames_per_clip:
            raise ValueError(
                f"num_frames ({num_frames}) must be a multiple of {tubelet_size} and at most "
                f"{self.config.frames_per_clip}, one window of the tower; use VJepaQwenModel.get_video_features "
                "for longer videos"
            )
        hidden_states = self.encoder(pixel_values_videos, **kwargs).last_hidden_state
        steps = hidden_states.unflatten(1, (num_frames // tubelet_size, -1))
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=steps.mean(dim=2, dtype=torch.float32)
        )


class VJepaQwenProjector(nn.Module):
    """Event features to the language model's embeddings: three linear layers with an activation between."""

    def __init__(self, config: VJepaQwenConfig):
        super().__init__()
        vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
        self.linear_1 = nn.Linear(vision_size, config.projector_hidden_size)
        self.linear_2 = nn.Linear(config.projector_hidden_size, config.projector_hidden_size)
        self.linear_3 = nn.Linear(config.projector_hidden_size, text_size)
        self.act = ACT2FN[config.projector_hidden_act]

    def forward(self, event_features: torch.FloatTensor) -> torch.FloatTensor:
        """`(num_events, vision hidden)` of any float dtype to `(num_events, text hidden)` of the projector's dtype."""
        # The bias tells the compute dtype: unlike the weights it is never packed by a quantiser.
        hidden_states = self.act(self.linear_1(event_features.to(self.linear_1.bias.dtype)))
        return self.linear_3(self.act(self.linear_2(hidden_states)))


class VJepaQwenPreTrainedModel(LinkedCheckpointMixin, PreTrainedModel):
    config: VJepaQwenConfig
    config_class = VJepaQwenConfig
    base_model_prefix = "model"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VJEPA2Layer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # What a linked V-JEPA 2 or Qwen3.5 checkpoint holds and this model does not need.
    _keys_to_ignore_on_load_unexpected = [r"predictor\.", r"^mtp\.", r"model\.visual\."]


class VJepaQwenModel(VJepaQwenPreTrainedModel):
    """The tower, the projector and the language model without its head."""

    def __init__(self, config: VJepaQwenConfig):
        super().__init__(config)
        self.vision_tower = VJepaQwenVisionTower._from_config(config.vision_config)
        self.multi_modal_projector = VJepaQwenProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_features: torch.FloatTensor | None = None,
        frame_event_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        The one door to vision: frames, or features of frames, to one embedding for each event.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(num_videos, num_frames, 3, crop_size, crop_size)`):
                Normalised frames in whole windows of the tower (or one shorter window).
            frame_features (`torch.FloatTensor` of shape `(num_videos, num_steps, vision hidden)`, *optional*):
                Instead of the frames: spatially mean-pooled tower output. Nothing is encoded then.
            frame_event_ids (`torch.LongTensor` of shape `(num_videos, num_steps)`):
                Event of each temporal step within its video, -1 for padding.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(num_videos, num_steps, vision hidden)`, the frame
            features, and `pooler_output`, a list with one `(num_events, text hidden)` tensor for each video.

        Raises:
            ValueError: when the inputs do not fit each other.
        """
        if (pixel_values_videos is None) == (frame_features is None):
            raise ValueError("Exactly one of pixel_values_videos and frame_features must be given")
        if frame_event_ids is None:
            raise ValueError(
                "frame_event_ids must be given: they tell which steps form an event; VJepaQwenProcessor returns them"
            )
        num_events = count_events(frame_event_ids)
        num_steps = (frame_event_ids >= 0).sum(dim=1).tolist()
        if frame_features is None:
            frame_features = self._encode(pixel_values_videos, num_steps, frame_event_ids.shape[1], **kwargs)
        hidden_size = self.config.vision_config.hidden_size
        if frame_features.shape != (*frame_event_ids.shape, hidden_size):
            raise ValueError(
                f"frame_features {tuple(frame_features.shape)} must have the shape (num_videos, num_steps, hidden) = "
                f"{(*frame_event_ids.shape, hidden_size)}, given by frame_event_ids and the tower"
            )
        event_features = [
            pool_events(features, event_ids, count)
            for features, event_ids, count in zip(frame_features, frame_event_ids, num_events, strict=True)
        ]
        # One projector call for the whole batch, split again: a video's rows do not depend on the other rows.
        event_embeddings = self.multi_modal_projector(torch.cat(event_features))
        return BaseModelOutputWithPooling(
            last_hidden_state=frame_features, pooler_output=list(event_embeddings.split(num_events))
        )

    def _encode(self, pixel_values_videos, num_steps: list[int], max_steps: int, **kwargs) -> torch.FloatTensor:
        """Frames `(num_videos, num_frames, 3, height, width)` to features `(num_videos, max_steps, hidden)`.

        V-JEPA 2 has no attention mask, so the frames that pad a video to the batch's longest are left out here.
        """
        config = self.config.vision_config
        if len(pixel_values_videos) != len(num_steps):
            raise ValueError(
                f"pixel_values_videos ({len(pixel_values_videos)} videos) and frame_event_ids ({len(num_steps)} "
                "videos) must hold the same number of videos"
            )
        windows = []
        for video, video_steps in zip(pixel_values_videos, num_steps, strict=True):
            num_frames = video_steps * config.tubelet_size
            if num_frames > len(video):
                raise ValueError(
                    f"frame_event_ids ({video_steps} steps) must cover at most the {len(video)} frames of "
                    f"pixel_values_videos, {config.tubelet_size} frames each"
                )
            windows += video[:num_frames].split(config.frames_per_clip)
        encoded, tokens_per_step = [], (config.crop_size // config.patch_size) ** 2
        for num_frames, group in groupby(windows, key=len):
            tokens_per_window = num_frames // config.tubelet_size * tokens_per_step
            for batch in torch.stack(list(group)).split(max(TOKENS_PER_PASS // tokens_per_window, 1)):
                encoded.append(self.vision_tower(batch, **kwargs).pooler_output.flatten(0, 1))
        features = torch.cat(encoded).split(num_steps)
        return torch.stack([nn.functional.pad(steps, (0, 0, 0, max_steps - len(steps))) for steps in features])

    def _write_events(
        self, input_ids, inputs_embeds, event_embeddings: list[torch.FloatTensor], whole_videos: bool
    ) -> torch.FloatTensor:
        """Writes the events over the placeholders, after checking that each prompt has as many as its videos.

        With `whole_videos=False`, in `generate`, the embeddings may be a slice for one chunk of the prompt: then only
        the totals can be compared.
        """
        is_placeholder = self._find_placeholders(input_ids, inputs_embeds)
        num_placeholders = is_placeholder.sum(dim=1).tolist()
        num_events = [len(embeddings) for embeddings in event_embeddings]
        sample = self._first_mismatch(num_placeholders, num_events)
        if sample is not None and (whole_videos or sum(num_placeholders) != sum(num_events)):
            raise ValueError(
                f"Sample {sample} of the batch: the {num_placeholders[sample]} video placeholders of its prompt and "
                f"the events of its videos do not match (whole batch: {sum(num_placeholders)} placeholders, "
                f"{sum(num_events)} events, by video {num_events}). A prompt that was truncated, or "
                "frame_event_ids of other videos, are the usual causes; let VJepaQwenProcessor make both"
            )
        video_features = torch.cat(event_embeddings).to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_placeholder.unsqueeze(-1), video_features)

    def _unused_vision(self, inputs_embeds) -> torch.FloatTensor:
        """Zero, computed by what is trained of tower and projector, for a batch without video: its gradients are zeros
        instead of missing, and processes that train together wait for one another's gradients."""
        config, bias = self.config.vision_config, self.multi_modal_projector.linear_1.bias
        features = bias.new_zeros(1, config.hidden_size)
        if any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            shape = (1, config.tubelet_size, 3, config.crop_size, config.crop_size)
            features = self.vision_tower(bias.new_zeros(shape)).pooler_output[0]
        return 0.0 * self.multi_modal_projector(features).sum().to(inputs_embeds.device, inputs_embeds.dtype)

    def _find_placeholders(self, input_ids, inputs_embeds) -> torch.BoolTensor:
        if input_ids is not None:
            return (input_ids == self.config.video_token_id).to(inputs_embeds.device)
        token = torch.tensor(self.config.video_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)

    @staticmethod
    def _first_mismatch(num_placeholders: list[int], num_events: list[int]) -> int | None:
        """First sample whose placeholders are not the events of the next whole videos, None when all are."""
        remaining = list(num_events)
        for sample, missing in enumerate(num_placeholders):
            while missing > 0 and remaining:
                missing -= remaining.pop(0)
            if missing != 0:
                return sample
        return len(num_placeholders) - 1 if remaining else None

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_features: torch.FloatTensor | None = None,
        frame_event_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> VJepaQwenModelOutputWithPast:
        """
        See [`VJepaQwenForConditionalGeneration.forward`]; returns the last hidden state instead of logits.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of input_ids and inputs_embeds must be given")
        video_outputs = (mm_encoder_outputs or {}).get("video")
        if pixel_values_videos is not None or frame_features is not None:
            if video_outputs is not None:
                raise ValueError(
                    "mm_encoder_outputs must not be given together with pixel_values_videos or frame_features"
                )
            video_outputs = self.get_video_features(pixel_values_videos, frame_features, frame_event_ids)

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if video_outputs is not None:
            inputs_embeds = self._write_events(
                input_ids, inputs_embeds, video_outputs.pooler_output, whole_videos=mm_encoder_outputs is None
            )
        elif (past_key_values is None or past_key_values.get_seq_length() == 0) and input_ids is not None:
            # Only before the first cached token: a model may well generate the placeholder's id itself.
            num_placeholders = (input_ids == self.config.video_token_id).sum(dim=1)
            if num_placeholders.any():
                sample = int(num_placeholders.argmax())
                raise ValueError(
                    f"Sample {sample} of the batch: its prompt has {int(num_placeholders[sample])} video placeholders "
                    "but no video was given; pass pixel_values_videos or frame_features, with frame_event_ids"
                )
        if video_outputs is None and self.training:
            inputs_embeds = inputs_embeds + self._unused_vision(inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return VJepaQwenModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            video_hidden_states=torch.cat(video_outputs.pooler_output) if video_outputs is not None else None,
        )


class VJepaQwenForConditionalGeneration(VJepaQwenPreTrainedModel, GenerationMixin):
    """VJepaQwen with its language head: videos and text in, text out.

    Example:

    ```python
    >>> from transformers import AutoModel, AutoProcessor

    >>> processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    >>> model = AutoModel.from_pretrained(repo, trust_remote_code=True, dtype="auto", device_map="auto")
    >>> processor.bind(model)
    >>> content = [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "Describe this video."}]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
    ...     return_dict=True, return_tensors="pt",
    ... ).to(model.device)
    >>> output = model.generate(**inputs, max_new_tokens=256)
    >>> processor.batch_decode(output[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    ```
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VJepaQwenConfig):
        super().__init__(config)
        self.model = VJepaQwenModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # Where the embeddings lie depends on the text model ("embed_tokens", "wte", ...).
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_video_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`VJepaQwenModel.get_video_features`]."""
        return self.model.get_video_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        frame_features: torch.FloatTensor | None = None,
        frame_event_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> VJepaQwenCausalLMOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Prompts with one `video_token_id` for each event.
            pixel_values_videos (`torch.FloatTensor` of shape `(num_videos, num_frames, 3, crop_size, crop_size)`):
                Normalised frames of all videos of the batch, in prompt order.
            frame_features (`torch.FloatTensor` of shape `(num_videos, num_steps, vision hidden)`, *optional*):
                Instead of the frames, what the tower made of them.
            frame_event_ids (`torch.LongTensor` of shape `(num_videos, num_steps)`, *optional*):
                Event of each temporal step within its video, -1 for padding. Needed with either of the two above.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 for tokens, 0 for padding.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Ids to predict, not shifted; -100 is left out of the loss.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Last positions to score, 0 for all.
            mm_encoder_outputs (`dict`, *optional*):
                `{"video": output of get_video_features}`, instead of frames or features.

        Raises:
            ValueError: when placeholders and events do not match; the error names the sample and both numbers.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values_videos=pixel_values_videos,
            frame_features=frame_features,
            frame_event_ids=frame_event_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return VJepaQwenCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            video_hidden_states=outputs.video_hidden_states,
        )

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict) -> dict:
        # transformers encodes here when it sees pixels; of `frame_features` it knows nothing and would drop them.
        if model_kwargs.get("frame_features") is not None:
            if (model_kwargs.get("mm_encoder_outputs") or {}).get("video") is not None:
                raise ValueError("mm_encoder_outputs must not be given together with frame_features")
            video_outputs = self.get_video_features(
                model_kwargs.pop("pixel_values_videos", None),
                model_kwargs.pop("frame_features"),
                model_kwargs.pop("frame_event_ids", None),
            )
            model_kwargs["mm_encoder_outputs"] = {"video": video_outputs}
        return super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)


VJepaQwenForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = [
    "VJepaQwenForConditionalGeneration",
    "VJepaQwenModel",
    "VJepaQwenPreTrainedModel",
    "VJepaQwenProjector",
    "VJepaQwenVisionTower",
]
