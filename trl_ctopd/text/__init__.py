"""Bytes and chunks: what a token stands for, how two tokenizers cut one text, how two templates write one turn.

Knows tokenizers; neither a model nor HTML.
"""
