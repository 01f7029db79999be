"Reads everything from settings.ini, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable']
setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    license='Apache-2.0',
    url=cfg['git_url'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['mixmix_nb*']),
    include_package_data=True,
    python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(), 'tensorboard': ['tensorboard'], 'wandb': ['wandb'], 'fidelity': ['torch-fidelity']},
    classifiers=[
        'Development Status :: ' + statuses[int(cfg['status'])],
        'Intended Audience :: Developers', 'Intended Audience :: Science/Research', 'Intended Audience :: Education',
        'Natural Language :: English', 'Programming Language :: Python :: 3',
    ],
    entry_points={'nbdev': [f'{cfg["lib_name"]}={cfg["lib_name"]}._modidx:d'], 'console_scripts': cfg['console_scripts'].split()},
    zip_safe=False,
)
