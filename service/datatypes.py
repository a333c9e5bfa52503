from service.codecs.datatypes import by_name, of

__all__ = ["by_name", "of"]
