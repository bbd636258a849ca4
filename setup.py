"""setup.cfg says everything but the text of an index page: the README without its pictures and links that lead into this repository,
where a page elsewhere has nothing to show."""

import re
from pathlib import Path

from setuptools import setup


readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
without_pictures = re.sub(r"^!\[[^]]*\]\((?!https?:)[^)]*\)\n+", "", readme, flags=re.MULTILINE)
plain = re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", without_pictures)

setup(long_description=plain, long_description_content_type="text/markdown")
