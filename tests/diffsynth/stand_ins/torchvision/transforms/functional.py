from PIL import Image


def resize(picture, size, **_kwargs):
    return picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def center_crop(picture, size):
    height, width = size
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
