"""mmrl: one library of policy-gradient objectives for image, vision-language and text models."""

__version__ = "0.1.0"
