"""Pretrained weights in and out: this package's, transformers', timm's, torchvision's and Google's."""

from .loading import LoadingReport, checkpoint_facts, load_pixel_facts, load_pretrained, load_processor

__all__ = ["LoadingReport", "checkpoint_facts", "load_pixel_facts", "load_pretrained", "load_processor"]
