"""Load a pretrained model and trace it once."""
