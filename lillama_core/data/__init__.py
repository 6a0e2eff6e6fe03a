"""What a model is fed, for calibration and for evaluation: text, speech, images, and text that it writes itself."""
