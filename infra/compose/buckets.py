"""Makes the buckets that are not there: ``buckets.py NAME ...``, with the usual AWS settings."""

import sys

import boto3


def main(names: list[str]) -> None:
    s3 = boto3.client("s3")
    there = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    for name in names:
        if name not in there:
            s3.create_bucket(Bucket=name)
        print(f"{name}: {'there' if name in there else 'made'}")


if __name__ == "__main__":
    main(sys.argv[1:])
