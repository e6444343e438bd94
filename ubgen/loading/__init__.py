"""Labelled images of any layout, decoded, augmented and put into batches, for pre-training and evaluation."""
