"""Detection (Mask R-CNN on COCO) and segmentation (UPerNet on ADE20K) on top of a backbone: the paper's Table 2."""
