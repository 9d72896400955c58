"""The toy: a small trained checkpoint, the synthetic shorts it was trained on, and the recipe."""
