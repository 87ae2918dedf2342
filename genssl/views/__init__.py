"""Views: standard augmentations, and where variants enter."""
