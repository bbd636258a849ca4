"""Models as they are loaded: tokenizers and vocabularies that fit them, an LM head apart from its model, sharding."""
