"""Images: folders of pictures as pixels."""
