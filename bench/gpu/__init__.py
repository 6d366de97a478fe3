"""What an NVIDIA GPU makes of this: kernels against their references, FlashInfer's masks, times against their floor."""
