"""Answers which networks there are and how each one is built by name; start at `registry.build_model`.

Does not train, load weights or touch images; importing this package does not import torchvision.
"""
