#!/bin/bash
# A real SLURM cluster of two nodes, n1 and n2, on one machine: for tests, in a container, as root.
#   cluster.sh install      the programs, from Debian, where they are missing
#   cluster.sh start DIR    then export SLURM_CONF=DIR/slurm.conf
#   cluster.sh stop DIR     ends what was started
#   cluster.sh remove       the programs, when install brought them
# Debian's slurmd can run several times on a machine. No systemd, no cgroups, no accounting.
set -eu
packages=(slurm-wlm slurm-wlm-basic-plugins munge)
stamp=/var/tmp/galatea-installed-slurm
hosts='127.0.0.1 n1 n2 # galatea tests'

installed() { dpkg-query --show --showformat '${Package}\n' | sort; }

case $1 in
install)
  command -v slurmctld >/dev/null && command -v munged >/dev/null && exit
  export DEBIAN_FRONTEND=noninteractive
  before=$(installed)
  apt-get update -qq
  apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
  comm -13 <(echo "$before") <(installed) > "$stamp"
  exit ;;
remove)
  [ -e "$stamp" ] || exit 0
  xargs env DEBIAN_FRONTEND=noninteractive apt-get purge -qq -y < "$stamp" >/dev/null
  rm -f "$stamp"
  exit ;;
esac

D=$(mkdir -p "$2" && cd "$2" && pwd) R=$D/run H=$(hostname -s)
export SLURM_CONF=$D/slurm.conf

if [ "$1" = stop ]; then
  scancel --state=PENDING --user=root 2>/dev/null || true
  scancel --full --signal=KILL --user=root 2>/dev/null || true
  for _ in $(seq 150); do [ -z "$(squeue --noheader 2>/dev/null)" ] && break; sleep .2; done
  for name in slurmd.n1 slurmd.n2 slurmctld munged; do
    [ -f "$R/$name.pid" ] && kill "$(cat "$R/$name.pid")" 2>/dev/null || true
  done
  others=$(grep -vF "$hosts" /etc/hosts) && echo "$others" > /etc/hosts
  exit 0
fi

mkdir -p "$R/ctld" "$R/slurmd.n1" "$R/slurmd.n2"
cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$H(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge/munge.socket.2,cred_expire=20
SlurmctldPort=26817
SlurmdPort=26818
StateSaveLocation=$R/ctld
SlurmdSpoolDir=$R/slurmd.%n
SlurmctldPidFile=$R/slurmctld.pid
SlurmdPidFile=$R/slurmd.%n.pid
SlurmctldLogFile=$R/slurmctld.log
SlurmdLogFile=$R/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
KillWait=5
MinJobAge=3600
InactiveLimit=0
Waittime=0
NodeName=n1 NodeHostname=$H NodeAddr=127.0.0.1 Port=27001 CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname=$H NodeAddr=127.0.0.1 Port=27002 CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
printf 'CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n' > "$D/cgroup.conf"
if ! munge --no-input >/dev/null 2>&1; then # its own user, closed folders, a key that it alone reads
  install -d -o munge -g munge -m 0755 /run/munge
  install -d -o munge -g munge -m 0700 /var/log/munge /var/lib/munge /etc/munge
  [ -s /etc/munge/munge.key ] || head -c 1024 /dev/urandom > /etc/munge/munge.key
  chown munge:munge /etc/munge/munge.key && chmod 0400 /etc/munge/munge.key
  setpriv --reuid=munge --regid=munge --clear-groups /usr/sbin/munged
  ln -sf /run/munge/munged.pid "$R/munged.pid"
fi
# Lightning's first rank is found by its node's name.
grep -qF "$hosts" /etc/hosts || echo "$hosts" >> /etc/hosts
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF" -N n1
slurmd -f "$SLURM_CONF" -N n2
for _ in $(seq 600); do [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ] && exit 0; sleep .2; done
echo "the nodes do not come up, see $R" >&2
exit 1
