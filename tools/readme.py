"Write README.md from nbs/index.ipynb (`python tools/readme.py`), or see whether it is up to date (`--check`)."
import re, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

def cell_markdown(c): # text
    "A markdown cell as it is, a code cell as a block, hidden ones dropped."
    src = ''.join(c['source']).strip()
    if c['cell_type']=='markdown': return src
    if not src or src.startswith('#|'): return ''
    return f'```python\n{src}\n```'

def readme(): # text
    "The README as the index says it: links to notebooks become links below nbs/."
    import json
    nb = json.loads((ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8'))
    parts = ['<!-- made from nbs/index.ipynb by tools/readme.py: edit there -->'] + [cell_markdown(c) for c in nb['cells']]
    text = '\n\n'.join(p for p in parts if p)+'\n'
    return re.sub(r'\]\((?!https?:|#|\.\./)([^)]+)\)', r'](nbs/\1)', text).replace('](../', '](')

if __name__=='__main__':
    out, text = ROOT/'README.md', readme()
    if '--check' not in sys.argv: out.write_text(text, encoding='utf-8')
    elif out.read_text(encoding='utf-8')!=text: sys.exit('README.md is older than nbs/index.ipynb: python tools/readme.py')
