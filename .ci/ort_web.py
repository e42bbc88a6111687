"The files of onnxruntime-web, for the tests of the page that draws: python .ci/ort_web.py FOLDER"

import sys
from pathlib import Path

from flowerdiff.apps.web_page import RUNTIME, fetch_npm

if __name__ == '__main__':
    folder = Path(sys.argv[1])
    if not all((folder / Path(name).name).is_file() for name in RUNTIME.files):
        folder.mkdir(parents=True, exist_ok=True)
        fetch_npm(RUNTIME, folder)
