"""Evaluation of backbones: transfer, few-shot, bias, and accuracy on a validation set."""
