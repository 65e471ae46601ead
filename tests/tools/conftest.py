"""What several tests of the command begin with."""

from command_models import _cache, folder, given, images, text, written

__all__ = ["_cache", "folder", "given", "images", "text", "written"]
