"""Speech: sound files, manifests and datasets of utterances."""
