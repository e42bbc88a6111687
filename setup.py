"Packaging, from settings.ini. The stage notebooks and the studio travel inside the wheel."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(); config.read('settings.ini', encoding='utf-8')
c, readme = config['DEFAULT'], Path('README.md')
extras = {k.removesuffix('_requirements'): v.split() for k, v in c.items() if k.endswith('_requirements')}

setup(
    name=c['lib_name'], version=c['version'], description=c['description'], keywords=c['keywords'],
    author=c['author'], author_email=c['author_email'], url=c['git_url'], license='Apache-2.0',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else c['description'],
    long_description_content_type='text/markdown',
    packages=[*find_packages(include=['flowerdiff', 'flowerdiff.*']), 'flowerdiff.notebooks', 'flowerdiff.apps'],
    package_dir={'flowerdiff.notebooks': 'nbs/stages', 'flowerdiff.apps': 'nbs/apps'},
    package_data={'flowerdiff': ['profiles/*.yaml', 'assets/**/*'], 'flowerdiff.notebooks': ['*.ipynb'], 'flowerdiff.apps': ['*.ipynb']},
    python_requires=f">={c['min_python']}", install_requires=c['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': c['console_scripts'].split()}, zip_safe=False,
    classifiers=['Programming Language :: Python :: 3.11', 'Intended Audience :: Developers', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
