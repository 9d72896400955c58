"""How good answers, events and token counts are: metrics for `evaluate.load`, and `vjepa-qwen evaluate`."""
