"""``normalizer.json``: 1,739 British spellings and their American forms, for Whisper's English text normaliser.

From OpenAI's Whisper (``whisper/normalizers/english.json``, Radford et al. 2022), MIT licence; transformers keeps the
same table in each checkpoint's ``normalizer.json``. CTranslate2 directories come without it.
"""
