#!/bin/bash
# A SLURM of one node, this machine, for `pytest -m slurm`. Debian or Ubuntu, as root; in a throw-away machine or
# container, because it writes /etc/slurm/slurm.conf. Stop it with `scontrol shutdown; pkill munged`.
set -euo pipefail

apt-get install -y -q --no-install-recommends slurm-wlm munge

install -d -m 755 -o munge -g munge /run/munge
runuser -u munge -- munged --force # --force: containers have unusual owners of /run

# CPUs as slurmd counts them; accounting, cgroups and MPI want services that a container does not have.
cat >/etc/slurm/slurm.conf <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)
SlurmUser=root
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=300
SchedulerParameters=sched_interval=2
$(slurmd -C | head -1) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
mkdir -p /var/spool/slurmctld /var/spool/slurmd
slurmctld
slurmd
for _ in $(seq 30); do
    [ "$(sinfo -h -o %T)" = idle ] && exec srun true
    sleep 1
done
sinfo
exit 1
