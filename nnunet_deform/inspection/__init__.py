"""Looking inside trained networks: what they see, and what their operators do.

The functions take tensors and networks and return arrays. ``nnunet-deform inspect`` uses them with nnU-Net's own
preprocessing and sliding window.
"""
