#!/bin/sh
# Runs a command with nothing but curl: sh run.sh [URL]
# Connect sends a stream as envelopes: a byte of flags, four of length, JSON. JSON may end in blanks, so the request is
# padded to 256 bytes (\0\0\1\0) and its header never changes. JSON holds no NUL, so the answer is split there.
url=${1:-http://127.0.0.1:49983}
request='{"process": {"cmd": "/bin/sh", "args": ["-c", "echo hello from $(uname -s)"]}, "stdin": false}'
printf '\0\0\0\1\0%-256s' "$request" |
curl -sSN --data-binary @- -H 'Content-Type: application/connect+json' "$url/process.Process/Start" |
tr '\0' '\n' | while IFS= read -r event || [ "$event" ]; do
    case $event in
    *'"stdout":"'*) event=${event#*'"stdout":"'} && printf %s "${event%%\"*}" | base64 -d ;;
    *'"end":{'*) event=${event#*'"status":"'} && echo "${event%%\"*}" ;;
    *'"code":'*) echo "{${event#*\{}" >&2; exit 1 ;;
    esac
done
