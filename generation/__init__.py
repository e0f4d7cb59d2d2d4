"""Diffusers pipelines in line with text and with people. Nothing is here yet: the training of SDXL comes first."""
