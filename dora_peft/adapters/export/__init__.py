"""Adapters for servers that do not know DoRA, with the loss stated.

adapted.py   the base's files with adapters over them; names.py which keys a parameter is made of
"""
