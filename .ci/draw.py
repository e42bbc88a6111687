"The page of the docs site that draws in the browser: python .ci/draw.py WORKSPACE FOLDER"

import sys

from flowerdiff.apps.web_page import write_web_page

PROMPTS = [
    'a red rose under a blue sky',
    'a yellow sunflower in a meadow',
    'three purple irises at sunset',
    'a white daisy on soil',
    'a large turquoise poppy at sunset',
]

if __name__ == '__main__':
    write_web_page(sys.argv[1], sys.argv[2], prompts=PROMPTS)
