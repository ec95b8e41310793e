"""What Ray Serve runs: the Router, the Denoiser, and the engines under it."""
