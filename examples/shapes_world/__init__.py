"""A miniature world: captioned 64x64 images, a judge that reads them, and a FLUX pipeline trained
on them."""
