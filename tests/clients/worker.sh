#!/bin/bash
# A client by Debian's sqlite3 shell: two of them, fed through pipes. See README.md.
set -euo pipefail
path=$1 worker=$2 rows=$3 record=$4
deadline=$((SECONDS + ${WORKER_SECONDS:-60}))

coproc FIRST { exec sqlite3 -batch "$path" 2>&1; }
first=("${FIRST[@]}")
exec {in0}<&"${first[0]}" {out0}>&"${first[1]}"
# A shell is a process: the second connection has to load the extension too.
{ coproc SECOND { exec sqlite3 -batch "$path" 2>&1; }; } 2>/dev/null # bash warns of a second coproc
second=("${SECOND[@]}")
exec {in1}<&"${second[0]}" {out1}>&"${second[1]}"
ins=("$in0" "$in1") outs=("$out0" "$out1")

# ask N TEXT: sends TEXT to shell N and leaves what it prints in $answer.
ask() {
    local line
    printf '%s\n.print end-of-answer\n' "$2" >&"${outs[$1]}"
    answer=
    while IFS= read -r -t 60 line <&"${ins[$1]}"; do
        [[ $line == end-of-answer ]] && return 0
        answer+=${answer:+$'\n'}$line
    done
    echo "the shell is gone or silent: $answer" >&2
    exit 1
}

json() {
    if [[ -z $1 ]]; then echo null; else
        local text=${1//\\/\\\\}
        text=${text//\"/\\\"}
        echo "\"${text//$'\n'/\\n}\""
    fi
}

states=()
for n in 0 1; do
    if [[ -n ${TURNSTILE_EXTENSION:-} ]]; then
        ask $n ".load $TURNSTILE_EXTENSION"
        [[ -z $answer ]] || { echo ".load: $answer" >&2; exit 1; }
    fi
    ask $n "PRAGMA turnstile_status;"
    states+=("$(json "$answer")")
done
ask 0 "SELECT sqlite_version();"
version=$answer

echo ready
read -r _

attempts=0 committed=0 busy=0
while ((committed < rows && SECONDS < deadline)); do
    attempts=$((attempts + 1))
    insert="INSERT INTO rows VALUES('$worker', $committed);"
    ((committed % 4 < 2)) || insert="BEGIN; $insert COMMIT;"
    ask $((committed % 2)) "$insert"
    case $answer in
        "") printf '%s %s\n' "$worker" "$committed" >>"$record"; committed=$((committed + 1)) ;;
        # A COMMIT that was refused leaves its transaction open.
        *locked*) busy=$((busy + 1)); ask $((committed % 2)) "ROLLBACK;" ;;
        *) echo "INSERT: $answer" >&2; exit 1 ;;
    esac
done

ask 0 "SELECT count(*) FROM rows WHERE worker = '$worker';"
while [[ $answer == *locked* ]] && ((SECONDS < deadline)); do
    busy=$((busy + 1))
    ask 0 "SELECT count(*) FROM rows WHERE worker = '$worker';"
done
[[ $answer =~ ^[0-9]+$ ]] || { echo "SELECT: $answer" >&2; exit 1; }
exec {out0}>&- {out1}>&- {in0}<&- {in1}<&-
for fd in "${first[@]}" "${second[@]}"; do exec {fd}>&-; done
wait
printf '{"worker": "%s", "attempts": %d, "committed": %d, "busy": %d, "seen": %d, "client": "sqlite3 %s", "sqlite": "%s", "status": [%s, %s]}\n' \
    "$worker" $attempts $committed $busy "$answer" "$version" "$version" "${states[@]}"
