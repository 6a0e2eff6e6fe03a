"""Speech recognition: Whisper."""
