"""Cuts `digits.u8` out of scikit-learn's wheel (the same file is in every wheel of 1.7.2):

    pip download --no-deps --only-binary=:all: scikit-learn==1.7.2
    python data/digits.py scikit_learn-1.7.2-*.whl
"""

import gzip
import hashlib
import sys
import zipfile
from pathlib import Path

INNER = "sklearn/datasets/data/digits.csv.gz"
SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"

packed = zipfile.ZipFile(sys.argv[1]).read(INNER)
assert hashlib.sha256(packed).hexdigest() == SHA256, "another version of the data"
rows = [
    [int(float(value)) for value in line.split(",")]
    for line in gzip.decompress(packed).decode().split()
]
assert len(rows) == 1797 and all(len(row) == 65 for row in rows)
content = bytes(value for row in rows for value in row)
Path(__file__).with_suffix(".u8").write_bytes(content)
print(hashlib.sha256(content).hexdigest())
