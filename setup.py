"Packaging from settings.ini: the one place where name, version and requirements stand"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib, readme = cfg['lib_name'], Path('README.md')
extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}

setup(
    name=lib, version=cfg['version'], description=cfg['description'], author=cfg['author'],
    author_email=cfg['author_email'], url=cfg['git_url'], keywords=cfg['keywords'].split(), license='Apache-2.0',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown', packages=find_packages(include=[lib, lib + '.*']),
    include_package_data=True, python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require=extras, zip_safe=False,
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=[f'{lib}={lib}._modidx:d']),
)
