"""The adapter types, one file each: the file's name is the type's name (with - for _).

A file has a function `build(classifier, adapter) -> model` that puts adapters into `classifier.model`, makes them and
the head trainable and everything else constant, and returns the model to train: its forward pass takes a batch without
labels and returns an object with `logits` [batch, classes]. Parameters of a layer must be named below that layer; what
lies elsewhere is trained always, like the head. That is all a new type needs. It may also say

EVERY_LAYER = False  when some layers have no parameters (otherwise that is an error)
BELOW = True         when parameters outside the layers need gradients through all of them
FROZEN = 0.3         least share of a trained layer's activations that a frozen layer stores, where it is below 0.6
PRETRAINED = True    when its parameters are the model's own weights, which checkpoints hold only once they trained
"""
