# The only code that runs in ring 0: from the PVH entry to ring 3, and the interrupt and exception stubs.
#
# Why so little: on a host whose KVM has no hardware help, ring 0 is emulated instruction by instruction while ring 3
# runs natively. So the workload, the network stack and the drivers all run in ring 3, with every page mapped for them
# and every port open through the TSS; ring 0 is only entered to sleep, and when something breaks. Nothing is hidden
# from ring 3: the rings are here for speed, not for protection.
#
# AT&T syntax.

# ---- The PVH note (XEN_ELFNOTE_PHYS32_ENTRY), by which a VMM finds the entry. ----
.section .note.pvh, "a", @note
    .long 4, 4, 18
    .asciz "Xen"
    .long pvh_entry

# ---- 32-bit entry: flat segments, paging off, EBX = hvm_start_info. ----
.section .text.boot, "ax"
.code32
.globl pvh_entry
pvh_entry:
    cld
    cli
    movl $0x620, %eax               # CR4: PAE | OSFXSR | OSXMMEXCPT
    movl %eax, %cr4
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          # EFER: LME | SCE
    rdmsr
    orl $0x101, %eax
    wrmsr
    movl $0x80050033, %eax          # CR0: PG | AM | WP | NE | ET | MP | PE
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $0x10, $long_mode

.code64
long_mode:
    movl $0x18, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $ring0_stack_top, %esp
    movl %ebx, %r12d                # hvm_start_info; CPUID overwrites EBX

    movl $tss, %eax                 # The descriptor splits the base: no relocation can express it.
    movw %ax, gdt_tss + 2
    shrl $16, %eax
    movb %al, gdt_tss + 4
    movb %ah, gdt_tss + 7
    movl $0x28, %eax
    ltr %ax
    lidt idt_pointer                # Still empty: ring 3 fills it in, where code is fast.

    # Ask for kvm-clock here and not in ring 3: without hardware help CPUID may answer for the host there.
    # R13 = MSR number, or 0.
    xorl %r13d, %r13d
    movl $0x40000000, %eax
    cpuid
    cmpl $0x4b4d564b, %ebx          # "KVMKVMKVM\0\0\0"
    jne 1f
    cmpl $0x564b4d56, %ecx
    jne 1f
    movl $0x40000001, %eax
    cpuid
    testl $8, %eax                  # KVM_FEATURE_CLOCKSOURCE2
    jz 1f
    movl $0x4b564d01, %ecx          # MSR_KVM_SYSTEM_TIME_NEW
    movl $pvclock_page + 1, %eax    # bit 0 enables
    xorl %edx, %edx
    wrmsr
    movl %ecx, %r13d
1:
    pushq $0x43                     # SS, ring 3
    pushq $ring3_stack_top
    pushq $0x3002                   # RFLAGS: IF clear (see ring3_entry), IOPL 3 where it sticks
    pushq $0x3b                     # CS, ring 3
    pushq $ring3_entry
    iretq

# Ring 3 keeps IF clear: interrupts are taken only while it sleeps, so that busy code is never interrupted and a wake-up
# between "nothing to do" and HLT stays pending until HLT. Where IF cannot be clear in ring 3 (a KVM without hardware
# help), `wake_pending` below gives the same guarantee.
ring3_entry:
    movl $bss_start, %edi
    movl $bss_end, %ecx
    subl %edi, %ecx
    shrl $3, %ecx
    xorl %eax, %eax
    rep stosq
    movl %r12d, %edi
    movl %r13d, %esi
    call ring3_main
    ud2

# ---- Interrupts: note that something happened, end the interrupt. ----
.globl stub_timer
stub_timer:
    movl $1, wake_pending
    pushq %rax
    movl $0xfee000b0, %eax          # local APIC EOI
    movl $0, (%rax)
    popq %rax
    iretq

.globl stub_device
stub_device:
    movl $1, device_pending
    jmp stub_timer

.globl stub_spurious
stub_spurious:
    iretq

# ---- #GP: HLT in ring 3 is how the guest sleeps; anything else is a fault. ----
.globl stub_general_protection
stub_general_protection:
    cmpl $0, crash_requested
    jne triple_fault
    pushq %rax
    movq 16(%rsp), %rax             # the faulting RIP
    cmpb $0xf4, (%rax)              # HLT
    jne 2f
    testb $3, 24(%rsp)              # in ring 3
    jz 2f
    popq %rax
    addq $8, %rsp                   # the error code
    incq (%rsp)                     # past the HLT
    cmpl $0, wake_pending           # Interrupts are off here, and STI holds them until HLT: no wake-up is lost.
    jne 3f
    sti
    hlt
3:  iretq
2:  popq %rax
    pushq $13
    jmp fault

# ---- Every other exception: a table of stubs that push the vector (and a zero where the CPU pushes no error code). ----
.globl fault_stubs
.balign 16
fault_stubs:
.set vector, 0
.rept 32
    .balign 16
    .if (0x60227d00 >> vector) & 1  # 8, 10-14, 17, 21, 29, 30
    .else
    pushq $0
    .endif
    pushq $vector
    jmp fault
    .set vector, vector + 1
.endr

# Hand the fault to ring 3 to print, once; a fault on the way there ends the machine.
fault:
    cmpl $0, crash_requested
    jne triple_fault
    movl $1, crash_requested
    popq %rdi                       # vector
    popq %rsi                       # error code
    movq (%rsp), %rdx               # RIP
    movq %cr2, %rcx
    movq 24(%rsp), %r8              # RSP
    pushq $0x43
    pushq $ring3_stack_top - 8      # as after a call, so that the ABI's alignment holds
    pushq $0x3002
    pushq $0x3b
    pushq $ring3_fault
    iretq

# A VMM sees a triple fault as a shutdown of the machine (KVM_EXIT_SHUTDOWN), which no stop by HLT looks like.
triple_fault:
    lidt null_idt_pointer
    ud2

# ---- Tables. ----
.section .data.page_aligned, "aw", @progbits
# The first 4 GiB one to one in 2 MiB pages, made by the assembler so that slow ring 0 need not: present, writable, user.
.balign 4096
.globl boot_pdpt
boot_pml4:
    .quad boot_pdpt + 7
    .fill 511, 8, 0
boot_pdpt:
    .quad boot_pd + 7, boot_pd + 0x1007, boot_pd + 0x2007, boot_pd + 0x3007
    .fill 508, 8, 0
boot_pd:
.set frame, 0
.rept 2048
    .quad (frame << 21) + 0x87
    .set frame, frame + 1
.endr

# The TSS: a stack for ring 0 and an I/O bitmap with every port open (ring 3 may lose its IOPL).
.balign 4096
tss:
    .long 0
    .quad ring0_stack_top
    .fill 0x66 - 12, 1, 0
    .word 0x68
    .fill 0x2000, 1, 0
    .byte 0xff                      # the bitmap's terminator

.section .data.tables, "aw", @progbits
.balign 16
gdt:
    .quad 0
    .quad 0
    .quad 0x00af9b000000ffff        # 0x10 ring 0 code, 64-bit
    .quad 0x00cf93000000ffff        # 0x18 ring 0 data
    .quad 0                         # 0x20
gdt_tss:
    .quad 0x0000890000002068        # 0x28 TSS, 16 bytes
    .quad 0
    .quad 0x00affb000000ffff        # 0x38 ring 3 code, 64-bit
    .quad 0x00cff3000000ffff        # 0x40 ring 3 data
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 4095
    .quad idt
null_idt_pointer:
    .word 0
    .quad 0
.balign 4
.globl wake_pending
wake_pending:
    .long 0
.globl device_pending
device_pending:
    .long 0
.globl crash_requested
crash_requested:
    .long 0

# Not in .bss: KVM writes the clock before .bss is zeroed.
.balign 64
.globl pvclock_page
pvclock_page:
    .fill 64, 1, 0

.section .bss.idt, "aw", @nobits
.balign 4096
.globl idt
idt:
    .skip 4096

.section .stacks, "aw", @nobits
.balign 16
    .skip 4096
ring0_stack_top:
    .skip 131072
ring3_stack_top:

.text
