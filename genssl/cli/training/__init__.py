"""Commands that train and judge encoders."""
