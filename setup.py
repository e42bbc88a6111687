"Packaging, from settings.ini. The stage notebooks and the studio travel inside the wheel."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

config = ConfigParser()
config.read('settings.ini', encoding='utf-8')
settings = config['DEFAULT']
readme = Path('README.md')
extras = {
    key.removesuffix('_requirements'): value.split()
    for key, value in settings.items()
    if key.endswith('_requirements')
}
# Folders of notebooks that become packages in the wheel, so that an installed library finds them.
notebooks = {'flowerdiff.notebooks': 'nbs/stages', 'flowerdiff.notebooks.apps': 'nbs/apps'}

setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    keywords=settings['keywords'],
    author=settings['author'],
    author_email=settings['author_email'],
    url=settings['git_url'],
    license='Apache-2.0',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else settings['description'],
    long_description_content_type='text/markdown',
    # Folders of data count as packages too: setuptools warns about data that is in none.
    packages=[*find_namespace_packages(include=['flowerdiff', 'flowerdiff.*']), *notebooks],
    package_dir=notebooks,
    package_data={
        'flowerdiff': ['profiles/*.yaml', 'assets/**/*'],
        'flowerdiff.notebooks': ['*.ipynb'],
        'flowerdiff.notebooks.apps': ['app.ipynb'],
    },
    python_requires=f'>={settings["min_python"]}',
    install_requires=settings['requirements'].split(),
    extras_require=extras,
    entry_points={
        'console_scripts': settings['console_scripts'].split(),
        'nbdev': ['flowerdiff=flowerdiff._modidx:d'],
    },
    zip_safe=False,
    classifiers=[
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Intended Audience :: Developers',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
