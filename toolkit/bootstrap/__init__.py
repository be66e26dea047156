"""Set-up of a fresh machine: the `.venv`, a private Apptainer, a Debian root folder.

Run by ``make`` with the host's own Python, before anything is installed: the
standard library is all there is. This file and `__main__` must parse on
Python 3.6, so that an old Python is told what to do.
"""
