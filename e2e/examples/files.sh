#!/bin/sh
# Files with nothing but curl: sh files.sh [URL]. Paths without a leading slash start at the user's home.
set -eu
url=${1:-http://127.0.0.1:49983} dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
put() { curl -sSf "$@" >/dev/null; }
rpc() { curl -sSf -H 'Content-Type: application/json' -d "$2" "$url/filesystem.Filesystem/$1"; }

# Upload one file (missing directories are made), two at once, one compressed; download, a part, compressed.
echo 'hello, file' >"$dir/hello"
put -T - -X POST -H 'Content-Type: application/octet-stream' "$url/files?path=$dir/up/raw" <"$dir/hello"
put -F "file=@$dir/hello;filename=$dir/up/one" -F "file=@$dir/hello;filename=$dir/up/two" "$url/files"
gzip -c "$dir/hello" | put --data-binary @- -H 'Content-Type: application/octet-stream' -H 'Content-Encoding: gzip' \
    -H 'X-Metadata-Purpose: example' "$url/files?path=$dir/up/zipped"
curl -sSf "$url/files?path=$dir/up/raw"
curl -sSf -r 7-10 "$url/files?path=$dir/up/one" && echo
curl -sSf --compressed "$url/files?path=$dir/up/zipped"

# A whole directory, down and up.
mkdir "$dir/copy"
curl -sSf -H 'Accept: application/x-tar' "$url/files?path=$dir/up" | tar -x -C "$dir/copy"
tar -c -C "$dir/copy" . | put --data-binary @- -H 'Content-Type: application/x-tar' "$url/files?path=$dir/back"
ls "$dir/back"

# Stat, list, make, move, remove; put pieces together.
rpc Stat '{"path": "'"$dir"'/up/zipped"}' | grep -o '"purpose":"[a-z]*"'
rpc ListDir '{"path": "'"$dir"'/up", "depth": 2}' | grep -o '"name":"[a-z]*"'
rpc MakeDir '{"path": "'"$dir"'/made"}' >/dev/null
rpc Move '{"source": "'"$dir"'/up/two", "destination": "'"$dir"'/made/two"}' >/dev/null
put -d '{"source_paths": ["'"$dir"'/up/one", "'"$dir"'/made/two"], "destination": "'"$dir"'/whole"}' "$url/files/compose"
cat "$dir/whole"

# Watch by polling.
id=$(rpc CreateWatcher '{"path": "'"$dir"'/made", "recursive": true}' | grep -o 'w[a-z0-9]\{20\}')
touch "$dir/made/new"
rpc GetWatcherEvents '{"watcherId": "'"$id"'"}' | grep -o 'EVENT_TYPE_CREATE'
rpc RemoveWatcher '{"watcherId": "'"$id"'"}' >/dev/null
rpc Remove '{"path": "'"$dir"'/back"}'
echo
