"""Plain functions that turn prompts, images, audio and masks into the tensors a model is conditioned on."""
