#!/usr/bin/env bash
# What `make dist` made must install, without a registry, into an empty venv and an empty npm project, and work there.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/tests/dist
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" # away from the checkout, so that nothing is found there by accident

"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --no-index "$root"/dist/polybus-*.whl
venv/bin/python -c 'import polybus, polybus.errors, polybus.outbox, polybus.testing'
venv/bin/polybus outbox ddl --dialect postgres >"$work/python.sql"
venv/bin/python "$here/smoke.py" "sqlite:///$work/python.db"

mkdir project && cd project
echo '{ "name": "empty", "private": true, "type": "module" }' >package.json
npm install --silent --offline --no-audit --no-fund "$root"/dist/polybus-*.tgz
cp "$here/smoke.mjs" .
node -e "import('polybus/testing').then(() => import('polybus/outbox'))"
npx --no polybus outbox ddl --dialect postgres >"$work/node.sql"
cmp "$work/python.sql" "$work/node.sql" # one command, whichever package installed it
node smoke.mjs "sqlite:///$work/node.db"

# The relay of either command carries what an outbox made by the other holds: here one row that is no event.
coproc server { exec "${PYTHON:-python3}" "$root/tests/support/database_server.py" postgres; }
read -r port <&"${server[0]}"
url=postgres://postgres@127.0.0.1:$port/postgres
psql=$(compgen -G '/usr/lib/postgresql/*/bin/psql' | tail -1 || command -v psql)
"$psql" -Xq -v ON_ERROR_STOP=1 -d "$url" -f "$work/python.sql"
for polybus in "$work/venv/bin/polybus" "npx --no polybus"; do
  "$psql" -Xq -d "$url" -c "INSERT INTO polybus_outbox (event_id, type, event) VALUES (gen_random_uuid()::text, 'a', 'no event')"
  said=$($polybus relay --db "$url" --bus "sqlite:///$work/relay.db" --once --workers 2)
  [ "$said" = "0 events relayed, 1 dead letters" ] || { echo "$polybus: $said" >&2; exit 1; }
done
eval "exec ${server[1]}>&-" # its input ends, and so does it
wait "$server_PID"

# The declarations stand on their own, without skipLibCheck.
echo "import * as polybus from 'polybus'; export default polybus" >types.ts
ln -s "$root/node_modules/@types" node_modules/@types
"$root/node_modules/.bin/tsc" --noEmit --strict --target es2022 --lib es2023,esnext.disposable --module nodenext --types node types.ts
echo 'declarations: ok'
