"""Scripts that run inside containers.

Each is self-contained: standard library and the image's own packages, Python 3.8
and later. They never import `toolkit`; this package exists so that the tests can
import them.
"""
