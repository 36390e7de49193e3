"""The adapter types, one file each, which ends in its `AdapterKind`; docs/extending.md shows how to add one.

Parameters of a layer must be named below that layer; what lies elsewhere is trained always, like the head.
"""
