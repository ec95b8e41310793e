"""The portable engine: DiffusionGemma in plain torch, on CPU and on any GPU that torch knows."""
