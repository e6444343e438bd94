"""A complete small family of pre-trained networks, and the procedural world that they were trained on."""
