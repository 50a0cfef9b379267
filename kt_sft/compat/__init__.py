"""What differs between releases of the libraries below us, and names of theirs that they do not document.

A file for each library: every private name, and every question for a release, has its public name here. The rest of the
package uses documented names only; `tests/test_house.py` holds that. A new release is a change of these files.
"""
